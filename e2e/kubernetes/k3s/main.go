// Command k3s is k3s's `server` command alone.
package main

import (
	"os"
	"runtime"

	"github.com/k3s-io/k3s/pkg/cli/cmds"
	"github.com/k3s-io/k3s/pkg/cli/server"
	"github.com/k3s-io/k3s/pkg/configfilearg"
	"github.com/k3s-io/k3s/pkg/version"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli"
)

func main() {
	// It refuses to run if this is not said. Its releases say it as they are linked.
	version.UpstreamGolang = runtime.Version()
	app := cmds.NewApp()
	app.Commands = []cli.Command{cmds.NewServerCommand(server.Run)}
	if err := app.Run(configfilearg.MustParse(os.Args)); err != nil {
		logrus.Fatal(err)
	}
}
