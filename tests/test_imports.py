"""Every module can be imported first: no circle of imports works in one order alone."""

import json
import pkgutil
import subprocess
import sys

import msn_jax

MODULES = [module.name for module in pkgutil.walk_packages(msn_jax.__path__, "msn_jax.")]
# One process, in which the libraries stay loaded; the flags of the programs are defined anew with their modules.
IMPORT_EACH_FIRST = """
import importlib, json, sys
from absl import flags
import jax, flax.linen
errors = {}
for name in sys.argv[1:]:
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "msn_jax"]:
        del sys.modules[loaded]
    for flag in [flag for flags_of in flags.FLAGS.flags_by_module_dict().items() if "msn_jax" in flags_of[0]
                 for flag in flags_of[1]]:
        if flag.name in flags.FLAGS:
            delattr(flags.FLAGS, flag.name)
    try:
        importlib.import_module(name)
    except ImportError as error:
        errors[name] = str(error)
print(json.dumps(errors))
"""


def test_every_module_can_be_imported_first():
    run = subprocess.run([sys.executable, "-c", IMPORT_EACH_FIRST, *MODULES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(MODULES) > 50 and json.loads(run.stdout) == {}


def test_decoding_does_not_wait_for_the_libraries_of_training():
    code = "import json, sys, msn_jax.generate; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(run.stdout)
    assert "flax" in loaded and not {"orbax", "grain", "tensorflow_datasets", "optax", "matplotlib"} & set(loaded)
