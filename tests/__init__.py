"""The tests."""

import os

# Threads of OpenMP wait for each other asleep. There are as many test processes as cores, and two threads in each: as
# long as they look again and again whether others are ready, these do not get on. It is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
