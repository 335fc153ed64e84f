"""What the net is: scaling table, backbone, fusion, topology, pyramid, heads."""
