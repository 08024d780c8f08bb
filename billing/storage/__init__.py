"""Storage: speaks SQL, and returns and raises our own types."""
