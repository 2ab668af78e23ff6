"""The one training loop, the losses, the teacher."""
