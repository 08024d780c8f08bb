"""Django REST Framework with simplejwt, as in its guides, in gunicorn's threads."""
