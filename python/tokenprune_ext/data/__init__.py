# SPDX-License-Identifier: Apache-2.0
"""Data sets as they lie on disk, and how published models want to see their images."""

from .folder import BrokenImage, ImageFolder, class_numbers, find_folder
from .transforms import Preprocessing, preprocessing

__all__ = ["BrokenImage", "ImageFolder", "Preprocessing", "class_numbers", "find_folder", "preprocessing"]
