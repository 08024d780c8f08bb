"""Everything Connexion needs from us, and what stands around it."""

import warnings

# Connexion 3.3 imports Starlette's test client, which asks for a successor of httpx: nothing an operator can mend.
warnings.filterwarnings("ignore", message="Using `httpx` with `starlette.testclient`")
