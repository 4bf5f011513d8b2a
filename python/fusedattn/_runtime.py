"""What runs here: the instruction set and the number of threads."""

from __future__ import annotations

from typing import Any

from fusedattn import _core


def cpu_info() -> dict[str, Any]:
    """What runs here.

    Returns
    -------
    dict
        ``isa`` the instruction set in use, ``isas`` those this CPU runs (best last), ``isas_built``
        those in this build, ``num_threads``, ``parallel`` what the parallel loop stands on,
        ``compiler``, ``build_type``, ``cpu`` the model's name.

    Raises
    ------
    ValueError
        If FUSEDATTN_ISA names an instruction set that is unknown or not supported here.
    """
    import platform

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                name,
            )
    except OSError:
        pass
    return {**_core.cpu_info(), "cpu": name}


def get_num_threads() -> int:
    """Threads that a call uses by default.

    Returns
    -------
    int
        What :func:`set_num_threads` chose, else FUSEDATTN_NUM_THREADS, else OpenMP's number
        (OMP_NUM_THREADS), else the CPUs this process may run on; a limit set through threadpoolctl
        lowers it.
    """
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Choose the default number of threads.

    Parameters
    ----------
    n : int or None
        At least 1; None goes back to the environment's choice. Results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        Not an integer, or out of range.
    """
    _core.set_num_threads(n)
