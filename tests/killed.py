"""A process that is killed before one of the changes that it makes to a folder."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback

CHANGES = ("os.", "open", "shutil.")


def killed(change, folder, at_event=None, counted=None, *, of=CHANGES, after_seconds=None):
    """Call `change(folder)` in a process of its own that dies before its n-th change of the disk.

    Args:
        change: writes to the folder.
        folder: a path.
        at_event: n, from 1; None: the process does not die of itself.
        counted: a file that receives the number of changes if the process did not die.
        of: beginnings of the events that count: events that name the folder, or lock a file.
        after_seconds: seconds until the process is killed from outside; None: never.

    Returns:
        Whether the process died.
    """
    child = os.fork()
    if child == 0:
        try:
            seen = []

            def count(event, args):
                here = str(folder) in str(args) or event == "fcntl.flock"
                if event.startswith(of) and here:
                    seen.append(event)
                    if len(seen) == at_event:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            change(folder)
            if counted is not None:
                counted.write_text(str(len(seen)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if after_seconds is not None:
        time.sleep(after_seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed by itself"
    return os.WIFSIGNALED(status)
