defmodule Mix.Tasks.Image.ModelsTest do
  # In this VM the command reads the application's configuration and the system's environment.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO

  alias Mix.Tasks.Image.Models
  alias StarweaveImage.{Command, Environment, TestJSON, Variables}

  @moduletag :tmp_dir
  @moduletag timeout: 300_000

  @tiny Path.expand("priv/models/starweave-tiny")
  @commit "0123456789abcdef0123456789abcdef01234567"

  setup %{tmp_dir: tmp_dir} do
    Variables.put(%{
      "HF_HOME" => Path.join(tmp_dir, "hf"),
      "HF_HUB_CACHE" => nil,
      "HF_HUB_OFFLINE" => nil,
      "HF_TOKEN" => nil,
      "HF_ENDPOINT" => "http://127.0.0.1:1"
    })
  end

  test "list has the embedded model and the configured folders" do
    configure(models: [{"my/own", path: @tiny}, "owner/other"])
    assert {0, json} = run_here(~w(list --json))

    assert [
             %{"id" => "starweave/tiny", "state" => "embedded", "licence" => "Apache-2.0"},
             %{"id" => "my/own", "state" => "local", "bytes" => bytes}
           ] = TestJSON.decode!(json)

    assert bytes > 20_000_000
    assert {0, table} = run_here([])
    assert table =~ ~r/^starweave\/tiny +- +24\.\d MB +- +embedded +Apache-2\.0$/m
    assert {0, "starweave/tiny is part of the package\n"} = run_here(~w(pull tiny --yes))
  end

  test "accept takes a configured model by its id, and any folder", %{tmp_dir: tmp_dir} do
    configure(models: [{"my/own", path: tmp_dir}, "owner/other"])

    taken =
      "weight files of #{Path.basename(tmp_dir)} are taken as they are when they are next loaded\n"

    said = "0 " <> taken
    assert {0, ^said} = run_here(~w(accept my/own))
    assert {0, ^said} = run_here(["accept", tmp_dir])
    assert {2, ""} = run_here(~w(accept my/gone))
  end

  test "wrong usage has exit code 2, and the code of Python is passed on" do
    error = capture_io(:stderr, fn -> assert {2, ""} = run_here(~w(fetch owner/model)) end)
    assert error =~ "fetch is none of list, pull, verify, accept, rm, prune"

    for {line, code, sentence} <- [
          {"prune --quota much", 2, "quota must be a size such as 40GB or 500MB, got much"},
          {"rm owner/model", 2, "owner/model is not in the cache"},
          {"pull owner/model --offline", 1,
           "owner/model is not all here, and offline mode forbids to fetch it"}
        ] do
      command = Command.run(["image.models" | String.split(line)])
      assert {command.status, command.output} == {code, ""}
      assert Command.stderr(command) == "starweave-image: #{sentence}\n"
    end
  end

  @tag :slow
  test "pull asks on a terminal; verify, prune and rm see what it fetched" do
    System.put_env("HF_ENDPOINT", hub("owner/tiny"))

    # No is the answer that need not be given.
    command =
      ~w(image.models pull owner/tiny)
      |> Command.start()
      |> Command.await_output("Fetch it under this licence?")
      |> Command.type("\n")
      |> Command.await_exit()

    assert command.status == 3
    assert command.output =~ "to fetch  24.1 MB"
    assert Command.stderr(command) =~ "Nothing was fetched"
    refute File.exists?(System.get_env("HF_HOME"))

    command =
      ~w(image.models pull owner/tiny)
      |> Command.start(terminal: true)
      |> Command.await_output("Fetch it under this licence?")
      |> Command.type("y\n")
      |> Command.await_exit()

    assert command.status == 0
    assert command.output =~ "licence   apache-2.0"
    assert command.output =~ "owner/tiny is here, revision #{@commit}"

    # From here on without the hub.
    System.put_env("HF_HUB_OFFLINE", "1")
    assert {0, "owner/tiny 0123456789ab: intact\n"} = run_here(~w(verify owner/tiny))

    configure(default_model: "owner/tiny")
    assert {1, "24.1 MB before, 24.1 MB after\n"} = run_here(~w(prune --quota 1MB))
    assert {0, list} = run_here(~w(list))

    assert list =~
             ~r/^owner\/tiny +0123456789ab +24\.1 MB +\d{4}-\d\d-\d\d +complete +apache-2\.0$/m

    configure([])
    assert {0, said} = run_here(~w(prune --quota 1MB --dry-run))
    assert said =~ "Would delete owner/tiny 0123456789ab"
    assert {0, "Deleted owner/tiny 0123456789ab\n"} = run_here(~w(rm owner/tiny))
    assert {0, "There are no models in the cache\n"} = run_here(~w(verify))
  end

  @tag :slow
  test "pull takes the revision that the configuration pins" do
    System.put_env("HF_ENDPOINT", hub("owner/tiny"))
    configure(models: [{"owner/tiny", revision: @commit}])
    assert {3, said} = run_here(~w(pull owner/tiny --dry-run))
    assert said =~ "owner/tiny at revision #{@commit}"

    configure(models: [{"owner/tiny", revision: "v9"}])
    assert {2, ""} = run_here(~w(pull owner/tiny --dry-run))
  end

  @tag :slow
  test "Python ends with a VM that is killed" do
    {:ok, listener} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listener)
    env = [{"HF_ENDPOINT", "http://127.0.0.1:#{port}"}]

    code =
      ~s|IO.puts("VM " <> System.pid()); Mix.Task.run("image.models", ~w(pull owner/model --yes))|

    command =
      Command.start(["run", "--no-start", "-e", code], env: env) |> Command.await_output("VM ")

    # It waits for an answer of the hub, which never comes.
    {:ok, connection} = :gen_tcp.accept(listener, 120_000)
    {:ok, _request} = :gen_tcp.recv(connection, 0, 60_000)
    assert [_, vm] = Regex.run(~r/^VM (\d+)$/m, command.output)
    Command.signal(String.to_integer(vm), "KILL")
    assert {:error, :closed} = :gen_tcp.recv(connection, 0, 60_000)
  end

  defp run_here(argv) do
    test = self()

    output =
      capture_io(fn ->
        send(test, {:ended, catch_exit([Models.run(argv), exit({:shutdown, 0})])})
      end)

    assert_received {:ended, {:shutdown, code}}
    {code, output}
  end

  defp configure(config) do
    Application.put_env(:starweave_image, StarweaveImage, config)
    on_exit(fn -> Application.delete_env(:starweave_image, StarweaveImage) end)
  end

  # The address of a hub of our own, which has the embedded model under this id.
  defp hub(id) do
    {:ok, python} = Environment.python()
    program = Path.expand("tests/support/python/stand_in_hub.py")

    server = Port.open({:spawn_executable, python}, [:binary, args: [program, "#{id}=#{@tiny}"]])

    assert_receive {^server, {:data, address}}, 60_000
    String.trim(address)
  end
end
