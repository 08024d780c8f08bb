"""The HTTP layer: everything Connexion needs from us, and what wraps it."""

import warnings

# Connexion 3.3 imports Starlette's test client, which deprecates httpx: nothing an operator can fix.
warnings.filterwarnings("ignore", message="Using `httpx` with `starlette.testclient`")
