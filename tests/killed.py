"""A process that is killed before one of the changes that it makes to a folder."""

from __future__ import annotations

import os
import signal
import sys
import traceback


def killed(change, folder, of=(), name="", nth=1):
    """Call `change(folder)` in a process of its own that dies before its n-th change of the disk.

    Args:
        change: writes to the folder.
        folder: a path.
        of: the beginning of the audit events that count; by default the process does not die.
        name: the beginning of the path in the folder that they name; a lock of a file names none.
        nth: n, from 1.

    Returns:
        Whether the process died.
    """
    child = os.fork()
    if child == 0:
        try:
            seen = []

            def count(event, args):
                here = str(folder / name) in str(args) or event == "fcntl.flock"
                if event.startswith(of) and here:
                    seen.append(event)
                    if len(seen) == nth:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            change(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed by itself"
    return os.WIFSIGNALED(status)
