"""`python -m kdtrain` is `kdtrain`."""

import sys

from kdtrain.cli import main

sys.exit(main())
