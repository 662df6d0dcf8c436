# SPDX-License-Identifier: Apache-2.0
"""Classification: losses, schedules and parameter groups of the published training recipes, latency budgets."""
