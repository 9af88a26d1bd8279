"""Tiny settings of a study's models."""

LOOP = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "average_decay": 0.0,
    "precision": "fp32",
    "save_every": 2,
}
VQVAE = {
    "loop": LOOP,
    "model": {"image_size": 16, "num_residual_blocks": 1, "residual_size": 4, "num_codes": 4, "code_dim": 4},
    "codebook_warmup_steps": 2,
}
PRIOR = {
    "loop": LOOP,
    "model": {"hidden_size": 8, "num_layers": 1, "first_kernel_size": 3, "head_size": 8},
    "num_samples": 4,
}
