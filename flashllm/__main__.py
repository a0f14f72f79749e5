"""`python -m flashllm`."""

import sys

from .cli.main import main

sys.exit(main())
