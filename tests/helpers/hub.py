"""The Hub of this process, and no other: huggingface_hub reads its address when it is imported.

Import this module before any that imports huggingface_hub.
"""

import os
import tempfile

from helpers.loopback_hub import LoopbackHub

HUB = LoopbackHub()
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_TOKEN": HUB.token,
    "HF_HOME": tempfile.mkdtemp(),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "0",
    "NO_PROXY": "127.0.0.1",
}

# What git checks out in place of a file that git-lfs holds.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
