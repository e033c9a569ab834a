"""What is trained and how: network, LightningModule, schedule, checkpoints, trainer."""
