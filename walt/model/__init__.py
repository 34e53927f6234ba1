"""The networks, the diffusion process and their configurations."""
