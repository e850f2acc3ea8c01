// Konnectivity-client does what it is told on standard input with the library by which kube-apiserver dials through an
// egress selector, and says what came of it. The tests that drive it decide what ought to come of it; it decides nothing.
//
//	konnectivity-client SOCKET
//
// A command is a line: what to do, the id of a connection, arguments. Commands of one id are done one after the other,
// those of different ids at the same time; cancel is done at once. An answer is a line: the id, the command, the outcome.
//
//	tunnel ID [shared]       opens a tunnel; shared: as one of several calls on one gRPC connection
//	dial ID TO TIMEOUT       dials in its tunnel, or in a new one   -> ID dial ok CONNECTED_MS | ID dial error MS TEXT
//	cancel ID                ends the context of its dial
//	write ID TEXT            writes the text and an end of line     -> ID write ok | ID write error TEXT
//	noise ID SEED LENGTH     writes that many bytes, as cluster/content.rs makes them
//	line ID                  reads a line                           -> ID line TEXT | ID line error TEXT
//	read ID                  reads to the end of file               -> ID read LENGTH SHA256
//	close ID                 closes it, waits for the tunnel's end  -> ID close ok MS | ID close error MS TEXT
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

// What kube-apiserver gives the connection to the socket.
const connectTimeout = 30 * time.Second

// One write: what kube-apiserver's TLS hands over at once.
const piece = 16 << 10

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: konnectivity-client SOCKET")
		os.Exit(2)
	}
	program := &program{socket: os.Args[1], conns: map[string]*conn{}}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		program.take(strings.Fields(lines.Text()))
	}
}

type program struct {
	socket string
	conns  map[string]*conn
	shared *sharedConn
	out    sync.Mutex
}

// conn is what has one id: a tunnel, then a connection through it.
type conn struct {
	id       string
	commands chan []string
	ctx      context.Context
	cancel   context.CancelFunc
	tunnel   client.Tunnel
	net.Conn
	reader *bufio.Reader
}

func (p *program) say(id string, words ...any) {
	p.out.Lock()
	defer p.out.Unlock()
	fmt.Println(append([]any{id}, words...)...)
}

func (p *program) take(words []string) {
	if len(words) < 2 {
		return
	}
	id := words[1]
	c := p.conns[id]
	if c == nil {
		c = &conn{id: id, commands: make(chan []string, 16)}
		c.ctx, c.cancel = context.WithCancel(context.Background())
		p.conns[id] = c
		go func() {
			for words := range c.commands {
				p.do(c, words[0], words[2:])
			}
		}()
	}
	if words[0] == "cancel" {
		c.cancel()
		return
	}
	c.commands <- words
}

func (p *program) do(c *conn, command string, args []string) {
	began := time.Now()
	ms := func() int64 { return time.Since(began).Milliseconds() }
	if c.Conn == nil && command != "tunnel" && command != "dial" {
		p.say(c.id, command, "error not dialled")
		return
	}
	switch command {
	case "tunnel":
		err := p.open(c, len(args) > 0)
		p.say(c.id, command, outcome(err))
	case "dial":
		err := p.dial(c, args)
		if err != nil {
			p.say(c.id, "dial error", ms(), err)
		} else {
			p.say(c.id, "dial ok", ms())
		}
	case "write":
		_, err := io.WriteString(c, strings.Join(args, " ")+"\n")
		p.say(c.id, command, outcome(err))
	case "noise":
		p.say(c.id, command, outcome(noise(c, args)))
	case "line":
		line, err := c.reader.ReadString('\n')
		if err != nil {
			p.say(c.id, command, outcome(err))
		} else {
			p.say(c.id, command, strings.TrimSuffix(line, "\n"))
		}
	case "read":
		hash := sha256.New()
		length, err := io.Copy(hash, c.reader)
		if err != nil {
			p.say(c.id, command, outcome(err))
		} else {
			p.say(c.id, command, fmt.Sprintf("%d %x", length, hash.Sum(nil)))
		}
	case "close":
		err := c.Close()
		took := ms()
		// Whatever is left open then, is a leak of ours or of the library's.
		<-c.tunnel.Done()
		if err != nil {
			p.say(c.id, "close error", took, err)
		} else {
			p.say(c.id, "close ok", took)
		}
	default:
		p.say(c.id, command, "error no such command")
	}
}

func outcome(err error) string {
	if err != nil {
		return "error " + err.Error()
	}
	return "ok"
}

// open does as kube-apiserver does, whose tunnels live as long as their connection and not as the request that dials.
func (p *program) open(c *conn, shared bool) (err error) {
	if shared {
		if p.shared == nil {
			p.shared, err = share(p.socket, p.options()...)
		}
		if err == nil {
			c.tunnel, err = p.shared.tunnel()
		}
		return err
	}
	options := append(p.options(), grpc.WithBlock(), grpc.WithReturnConnectionError())
	connecting, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	c.tunnel, err = client.CreateSingleUseGrpcTunnelWithContext(connecting, context.Background(), p.socket, options...)
	return err
}

func (p *program) options() []grpc.DialOption {
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.socket)
	}
	return []grpc.DialOption{
		grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
	}
}

func (p *program) dial(c *conn, args []string) error {
	if len(args) != 2 {
		return errors.New("dial ID TO TIMEOUT")
	}
	timeout, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	if c.tunnel == nil {
		if err := p.open(c, false); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	dialled, err := c.tunnel.DialContext(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	c.Conn, c.reader = dialled, bufio.NewReaderSize(dialled, 64<<10)
	return nil
}

// noise is xorshift64*.
func noise(to io.Writer, args []string) error {
	if len(args) != 2 {
		return errors.New("noise ID SEED LENGTH")
	}
	seed, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		return err
	}
	left, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	state := seed | 1
	for left > 0 {
		buffer := make([]byte, 0, piece)
		for len(buffer) < piece {
			state ^= state >> 12
			state ^= state << 25
			state ^= state >> 27
			buffer = binary.LittleEndian.AppendUint64(buffer, state*0x2545F4914F6CDD1D)
		}
		buffer = buffer[:min(left, piece)]
		if _, err := to.Write(buffer); err != nil {
			return err
		}
		left -= len(buffer)
	}
	return nil
}
