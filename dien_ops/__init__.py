# SPDX-License-Identifier: Apache-2.0
from dien_ops import _library

_library.load()
