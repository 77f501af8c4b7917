"""For tests/test_probe_teacher.py, until it imports these from helpers.py."""
from helpers import dump, edm_file, randomise  # noqa: F401
