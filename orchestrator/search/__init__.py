"""What to try next: a sweep's configuration, its space, its constraints and its verdict."""
