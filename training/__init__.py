"""How the models of the profile `demo` are made: a drawn world, and one program a model. Nothing of vidgen_ray needs it."""
