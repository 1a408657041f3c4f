"""The command line. Importing it, before torch, makes idle OpenMP threads sleep instead of spin.

Torch's threads share the cores with those that make views, and a machine is seldom one's own: spinning, a small
model's step took eight times as long on two busy cores (docs/benchmarks.md). A value that the user has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
