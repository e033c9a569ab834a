"""What is trained and how: networks, the LightningModule, the schedule, checkpoints, the trainer."""
