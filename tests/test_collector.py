"""In processes of their own: the tests have imported torch long ago."""

import subprocess
import sys


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_are_not_looked_through_then_or_later():
    run("""
import gc
from nanogpt_lit.runtime.collector import quick_imports
with quick_imports():
    assert not gc.isenabled()
    import decimal
assert gc.isenabled()
assert gc.get_freeze_count() > 0
""")


def test_in_a_process_with_torch_nothing_is_kept_from_the_collector():
    run("""
import gc, sys
from nanogpt_lit.runtime.collector import quick_imports
sys.modules["torch"] = None
with quick_imports():
    assert gc.isenabled()
assert gc.get_freeze_count() == 0
""")


def test_a_command_does_not_import_transformers_to_start():
    run("""
import importlib.util, sys
assert importlib.util.find_spec("transformers") is not None, "else there is nothing to leave out"
from nanogpt_lit.runtime.collector import quick_imports
with quick_imports():
    import lightning
assert "transformers" not in sys.modules
import transformers  # by who wants it
from lightning_utilities.core.imports import RequirementCache
assert RequirementCache("transformers")
""")
