"""What people look at: grids and pages."""
