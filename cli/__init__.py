"""`spiderpoolctl`: pools, services and endpoints in and out of the store of one machine."""
