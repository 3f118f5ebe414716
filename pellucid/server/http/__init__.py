"""HTTP itself: connections, limits, access, bodies, errors, server-sent events, metrics. It knows no model."""
