// Bind before connect in Go: go run connect.go /run/bridge/agent.sock 192.168.31.67:443
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
)

func main() {
	agent, to := os.Args[1], os.Args[2]
	unix := func(ctx context.Context, _, _ string) (net.Conn, error) { return net.Dial("unix", agent) }
	client := http.Client{Transport: &http.Transport{DialContext: unix}} // the lease lasts as long as its connection
	answer, err := client.Post("http://bridge/v1/leases", "application/json", strings.NewReader(fmt.Sprintf(`{"destination":%q}`, to)))
	if err != nil {
		panic(err)
	}
	var got struct {
		Error  string
		Leases []struct{ Port int }
	}
	if err := json.NewDecoder(answer.Body).Decode(&got); err != nil || len(got.Leases) == 0 {
		panic(fmt.Sprint(err, got.Error))
	}
	reuse := func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{Port: got.Leases[0].Port}, Control: reuse}
	stream, err := dialer.Dial("tcp", to)
	if err != nil {
		panic(err)
	}
	fmt.Println(stream.LocalAddr())
}
