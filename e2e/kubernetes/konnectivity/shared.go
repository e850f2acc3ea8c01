package main

import (
	"context"
	"errors"
	"io"
	"math/rand"
	"net"

	"google.golang.org/grpc"
	pb "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/proto/client"
)

// sharedConn is one gRPC connection for many tunnels. The library's own tunnels close theirs, so these are made of the
// library's generated client alone: the least that the protocol asks of one.
type sharedConn struct{ service pb.ProxyServiceClient }

func share(socket string, options ...grpc.DialOption) (*sharedConn, error) {
	// Not to be taken for the name of a host.
	conn, err := grpc.NewClient("passthrough:"+socket, options...)
	if err != nil {
		return nil, err
	}
	return &sharedConn{pb.NewProxyServiceClient(conn)}, nil
}

// call is a tunnel: one call on the connection, good for one dial.
type call struct {
	pb.ProxyService_ProxyClient
	end context.CancelFunc
}

func (s *sharedConn) tunnel() (*call, error) {
	ctx, end := context.WithCancel(context.Background())
	stream, err := s.service.Proxy(ctx)
	if err != nil {
		end()
		return nil, err
	}
	return &call{stream, end}, nil
}

func (c *call) Done() <-chan struct{} { return c.Context().Done() }

func (c *call) DialContext(_ context.Context, protocol, address string) (net.Conn, error) {
	random := rand.Int63()
	request := &pb.DialRequest{Protocol: protocol, Address: address, Random: random}
	if err := c.Send(&pb.Packet{Payload: &pb.Packet_DialRequest{DialRequest: request}}); err != nil {
		return nil, err
	}
	packet, err := c.Recv()
	if err != nil {
		return nil, err
	}
	response := packet.GetDialResponse()
	switch {
	case response == nil || response.Random != random:
		return nil, errors.New("no answer to the dial: " + packet.String())
	case response.Error != "":
		c.end()
		return nil, errors.New(response.Error)
	}
	return &callConn{call: c, id: response.ConnectID}, nil
}

// callConn is a connection in such a tunnel.
type callConn struct {
	net.Conn
	*call
	id     int64
	rest   []byte
	closed bool
}

func (c *callConn) Write(data []byte) (int, error) {
	packet := &pb.Packet{Type: pb.PacketType_DATA, Payload: &pb.Packet_Data{Data: &pb.Data{ConnectID: c.id, Data: data}}}
	if err := c.Send(packet); err != nil {
		return 0, err
	}
	return len(data), nil
}

func (c *callConn) Read(into []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.closed {
			return 0, io.EOF
		}
		packet, err := c.Recv()
		if err != nil {
			return 0, err
		}
		switch {
		case packet.GetData().GetConnectID() == c.id:
			c.rest = packet.GetData().Data
		case packet.GetCloseResponse().GetConnectID() == c.id:
			c.closed = true
		default:
			return 0, errors.New("not of this connection: " + packet.String())
		}
	}
	n := copy(into, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Close waits for the answer, as the library does.
func (c *callConn) Close() error {
	defer c.end()
	request := &pb.Packet{Type: pb.PacketType_CLOSE_REQ, Payload: &pb.Packet_CloseRequest{CloseRequest: &pb.CloseRequest{ConnectID: c.id}}}
	if c.closed {
		return nil
	}
	if err := c.Send(request); err != nil {
		return err
	}
	for !c.closed {
		if _, err := c.Read(make([]byte, piece)); err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}
