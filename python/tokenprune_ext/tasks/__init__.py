# SPDX-License-Identifier: Apache-2.0
"""What is done with the models: one folder per task."""
