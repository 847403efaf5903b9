"""Training of the super-network: losses, adapters, the LightningModule. Light until used."""
