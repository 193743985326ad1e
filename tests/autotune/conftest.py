"""Worker processes import the fakes by name, so their folder must be importable under any import mode of pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
