# SPDX-License-Identifier: Apache-2.0
"""How fast the operators are, beside what else there is: ``make bench``. How it is measured: harness.py."""
