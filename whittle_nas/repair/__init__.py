"""Closed-form repair of one sub-network: least squares, block by block, without gradients."""
