# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole suite: no network, few threads; `support` is importable because this file is here."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of the two test processes, and of what they start
