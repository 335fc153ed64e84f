"""Pages that are made from the sources when the site is built."""
