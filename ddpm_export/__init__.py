"""From images to a model file: the ε-network, its training, its export. Needs torch; what runs the file does not."""

from __future__ import annotations
