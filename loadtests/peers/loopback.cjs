// Loaded before a peer on Node that would listen on every address and cannot be told not to.
const { Server } = require("node:net");
const listen = Server.prototype.listen;
Server.prototype.listen = function (port, ...rest) {
  return listen.call(this, port, "127.0.0.1", ...rest.filter((it) => typeof it === "function"));
};
