"""moetrain: train Mixture-of-Experts language models from one YAML file.

The top-level folders kernels/, parallel/, placement/ and launch/ are imported as subpackages of moetrain through
relative symbolic links (``from moetrain.kernels import expert_mlp``): their plain names are taken on PyPI.
"""

__version__ = "0.1.0"
