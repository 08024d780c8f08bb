"""Django REST Framework with simplejwt, as its guides have it, behind gunicorn's threads."""
