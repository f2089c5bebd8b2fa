"""What an array is called: numpy's, of any type and shape; docstrings say which."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
