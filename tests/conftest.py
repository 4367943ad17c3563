"""Puts the project's root on the path, so that tests import the rooms as a script there would."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
