"""The control socket: MessagePack-RPC over a Unix socket, server and client."""
