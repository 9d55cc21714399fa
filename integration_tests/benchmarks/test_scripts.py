# SPDX-License-Identifier: Apache-2.0
"""Every script of this repository starts as its documentation says: `python PATH --help` from the root."""

import json
from pathlib import Path

from integration_tests.support.fresh_process import run_python


ROOT = Path(__file__).parents[2]
PLACES = ("integration_tests", "integration_tests/benchmarks", "integration_tests/benchmarks/gpu")
PLACES += ("integration_tests/runtimes", "examples", "examples/scenes", "examples/pixel_people")


def test_every_script_says_how_it_is_used():
    """In one process, since each needs torch; each sees the modules beside it and installed ones, nothing else."""
    scripts = [
        str(file.relative_to(ROOT))
        for place in PLACES
        for file in sorted((ROOT / place).glob("*.py"))
        if not file.name.startswith("test_")
        and "ArgumentParser(" in file.read_text()
        and '"__main__"' in file.read_text()
    ]
    assert len(scripts) > 15
    failed = run_python(
        """
        import contextlib, io, json, os, runpy, sys

        root, scripts = sys.argv[1], json.loads(sys.argv[2])
        os.chdir(root)
        installed = [path for path in sys.path if path not in ("", root)]
        failed = {}
        for script in scripts:
            before = set(sys.modules)
            sys.path[:] = [os.path.dirname(os.path.abspath(script)), *installed]
            sys.argv = [script, "--help"]
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output):
                    runpy.run_path(script, run_name="__main__")
                failed[script] = "did not stop at --help"
            except SystemExit as end:
                if end.code or "usage:" not in output.getvalue():
                    failed[script] = f"exit code {end.code}"
            except ModuleNotFoundError as error:
                if error.name != "resvg_py":  # rasterizes SVG for two of the examples, whose pages name it
                    failed[script] = repr(error)
            except BaseException as error:
                failed[script] = repr(error)
            # Modules beside a script go with it: other scripts have some of the same name.
            beside = tuple(f"{root}/{folder}/" for folder in ("integration_tests", "examples"))
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(beside):
                    del sys.modules[name]
        print(json.dumps(failed))
        """,
        ROOT,
        json.dumps(scripts),
    )
    assert not failed
