"""Storage: it speaks SQL, and answers in our words."""
