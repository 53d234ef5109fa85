"""Settings that every Kafka client here shares."""

Setting = str | int | float | bool


def client_config(bootstrap: str, **more: Setting) -> dict[str, Setting]:
    """Client properties, named with `_` for `.`; quiet about a broker that is being restarted."""
    config: dict[str, Setting] = {
        "bootstrap.servers": bootstrap,
        "log_level": 2,  # "connection refused" is 3, and expected while a broker is down
        "reconnect.backoff.max.ms": 250,
    }
    return config | {name.replace("_", "."): value for name, value in more.items()}
