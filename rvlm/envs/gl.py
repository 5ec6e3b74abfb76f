"""Choice of a headless OpenGL platform: EGL if a driver works, else OSMesa."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

BACKENDS = ("egl", "osmesa")
"""MuJoCo's headless OpenGL platforms on Linux, preferred first."""

_PROBE = (
    "import mujoco; context = mujoco.GLContext(8, 8); context.make_current(); "
    "mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), mujoco.mjtFontScale.mjFONTSCALE_100)"
)

INSTALL_HELP = """install one of
  Debian, Ubuntu:  sudo apt-get install -y libegl1 libgl1-mesa-dri    (or libosmesa6)
  Fedora:          sudo dnf install -y mesa-libEGL mesa-dri-drivers   (or mesa-libOSMesa)
  conda:           conda install -c conda-forge "mesalib<25.1"
or set MUJOCO_GL yourself (egl, osmesa, glfw)."""


class NoHeadlessOpenGL(RuntimeError):
    """No headless OpenGL platform works on this machine."""


def choose_gl() -> str:
    """Set `MUJOCO_GL` to the first headless platform that works, unless it is set, and return it.

    Call it before the first `import mujoco`, which reads the variable. Child processes inherit it. Returns "" on macOS and
    Windows, which have one platform each. Also sets the software renderer to one thread.

    Raises:
        NoHeadlessOpenGL: neither EGL nor OSMesa makes a context; names the packages to install.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: threads slow down small frames
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return os.environ.get("MUJOCO_GL", "")
    if "mujoco" in sys.modules:
        warnings.warn(
            "mujoco was imported before rvlm chose a headless OpenGL platform, so it tries to open a window; "
            "import rvlm.envs.tabletop first, or set MUJOCO_GL",
            stacklevel=2,
        )
    errors = {}
    for backend in BACKENDS:
        errors[backend] = _context_error(backend)
        if not errors[backend]:
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise NoHeadlessOpenGL(_message(errors))


def _context_error(backend: str) -> str:
    """Make a context in a subprocess; returns the last line of its error, "" if it worked."""
    environ = os.environ | {"MUJOCO_GL": backend}
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=environ, capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return ""
    return (probe.stderr.strip().splitlines() or [f"ended with status {probe.returncode}"])[-1]


def _message(errors: dict[str, str]) -> str:
    tried = "\n".join(f"  {backend}: {error}" for backend, error in errors.items())
    return f"expected headless OpenGL, but none of {', '.join(errors)} made a context:\n{tried}\n{INSTALL_HELP}"


if __name__ == "__main__":  # the Makefile calls it once and exports the result
    try:
        sys.stdout.write(choose_gl() + "\n")
    except NoHeadlessOpenGL as error:
        sys.exit(str(error))
