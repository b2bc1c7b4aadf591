// What is said comes back: echo.js ADDRESS PORT
const [address, port] = process.argv.slice(2)
require('net').createServer((socket) => socket.pipe(socket)).listen(+port, address)
