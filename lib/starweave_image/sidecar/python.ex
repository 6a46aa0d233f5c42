defmodule StarweaveImage.Sidecar.Python do
  @moduledoc false
  # The Python process of a sidecar as an operating system process: starts it, signals it, and tells why it ended.
  # Nothing here raises: errors are returned as sentences, and the application stays up.

  alias StarweaveImage.Environment.Program

  # How long to wait for the exit status after the kill of a process group. The kernel needs moments, unless the child
  # is in uninterruptible sleep, and then waiting longer does not help.
  @reap_ms 3_000

  # The variables of the application's environment that a sidecar sees. All others are withheld, since the environment
  # often contains secrets. Downloads need HF_TOKEN and the proxies.
  @allowed_env ~w(PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TEMP TMP XDG_CACHE_HOME XDG_DATA_HOME
    LD_LIBRARY_PATH DYLD_LIBRARY_PATH SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy
    TORCH_DTYPE TORCH_HOME CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_PATH
    HSA_OVERRIDE_GFX_VERSION HCC_AMDGPU_TARGET GPU_DEVICE_ORDINAL ZE_AFFINITY_MASK
    HF_HOME HF_TOKEN HF_TOKEN_PATH HF_ENDPOINT HUGGINGFACE_HUB_CACHE HF_MODULES_CACHE TRANSFORMERS_OFFLINE
    DO_NOT_TRACK DISABLE_TELEMETRY STARWEAVE_IMAGE_CACHE)
  @allowed_env_prefixes ~w(LC_ HF_HUB_ HF_XET_ NVIDIA_ HIP_ ROCR_ PYTORCH_ OMP_ MKL_ KMP_ ONEDNN_ DNNL_)

  @enforce_keys [:port, :os_pid, :interpreter]
  defstruct [:port, :os_pid, :interpreter]

  @type t :: %__MODULE__{port: port, os_pid: pos_integer, interpreter: Path.t()}

  @doc "Starts a process that connects its log to `log_socket`; it also sees the variables named in `extra`."
  @spec start(Path.t(), Path.t(), [String.t()]) :: {:ok, t} | {:error, String.t()}
  def start(interpreter, log_socket, extra) do
    {arguments, env} = Program.command(["port", "--log-socket", log_socket])

    port =
      Port.open({:spawn_executable, interpreter}, [
        :binary,
        :exit_status,
        :nouse_stdio,
        :hide,
        # The driver must call itself busy early, or `nosuspend` would queue without bound.
        {:busy_limits_port, {1_048_576, 4_194_304}},
        args: arguments,
        env: env(extra, env)
      ])

    case Port.info(port, :os_pid) do
      {:os_pid, os_pid} ->
        {:ok, %__MODULE__{port: port, os_pid: os_pid, interpreter: interpreter}}

      # The process has ended already; its exit status is in the mailbox.
      nil ->
        receive do
          {^port, {:exit_status, status}} -> {:error, exit_reason(status)}
        after
          0 -> {:error, "the Python process ended as it was started: run `mix image.setup`"}
        end
    end
  rescue
    error in ErlangError -> {:error, not_started(error.original)}
    error in ArgumentError -> {:error, not_started(Exception.message(error))}
  end

  defp not_started(reason) when reason in [:emfile, :enfile],
    do: "Python cannot be started: this system has no file descriptors left for it"

  defp not_started(reason) when reason in [:eagain, :enomem, :system_limit],
    do: "Python cannot be started: this system has no room for another process (#{reason})"

  defp not_started(reason),
    do:
      "Python cannot be started (#{if is_atom(reason), do: inspect(reason), else: reason}): run `mix image.setup`"

  # As bytes: names and values in the host's environment need not be valid text.
  defp env(extra, ours) do
    present = for {name, _value} <- :os.env(), do: name
    allowed = present |> Enum.map(&to_bytes/1) |> allowed_env(extra) |> MapSet.new()
    hidden = for name <- present, to_bytes(name) not in allowed, do: {name, false}
    names = for {name, _value} <- ours, do: to_charlist(name)

    Enum.reject(hidden, fn {name, _} -> name in names end) ++
      for {name, value} <- ours,
          name not in extra,
          do: {to_charlist(name), if(value, do: to_charlist(value), else: false)}
  end

  defp to_bytes(chars) do
    case :unicode.characters_to_binary(chars) do
      bytes when is_binary(bytes) -> bytes
      _not_text -> inspect(chars)
    end
  end

  @doc "The variables of `environment` that a sidecar may see."
  @spec allowed_env([String.t()], [String.t()]) :: [String.t()]
  def allowed_env(names, extra) do
    Enum.filter(names, fn name ->
      name in @allowed_env or name in extra or
        Enum.any?(@allowed_env_prefixes, &String.starts_with?(name, &1))
    end)
  end

  @doc "Kills the process and all that it started, and waits for its end; an error if that is not possible now."
  @spec kill(t) :: :ok | :error
  def kill(python) do
    with :ok <- signal(python, "KILL") do
      _ = ended?(python, @reap_ms)
      :ok
    end
  end

  @doc """
  Signals the process group that the process leads, and so all that it started.

  Erlang has no function for this. Without a shell, the Python interpreter sends the signal instead.
  """
  @spec signal(t, String.t()) :: :ok | :error
  def signal(%{os_pid: os_pid, interpreter: interpreter}, name) do
    code = "import os, signal; os.killpg(#{os_pid}, signal.SIG#{name})"

    with :error <- run("/bin/sh", ["-c", "kill -s #{name} -- -#{os_pid} 2>/dev/null"]),
         do: run(interpreter, ["-I", "-S", "-c", code])
  end

  # Whether the command could be run. It does not matter if no process was left to signal.
  defp run(program, arguments) do
    _ = System.cmd(program, arguments, stderr_to_stdout: true)
    :ok
  rescue
    ErlangError -> :error
  end

  @doc "Waits for the end of the process."
  @spec ended?(t, non_neg_integer) :: boolean
  def ended?(%{port: port}, timeout) do
    receive do
      {^port, {:exit_status, _}} -> true
      {:EXIT, ^port, _} -> true
    after
      timeout -> false
    end
  end

  @doc "Closes the port of a process that has ended, and kills the children it left behind."
  @spec close(t) :: :ok
  def close(%{port: port} = python) do
    _ = signal(python, "KILL")

    try do
      Port.close(port)
    rescue
      ArgumentError -> true
    end

    drop_messages(port)
  end

  defp drop_messages(port) do
    receive do
      {^port, _} -> drop_messages(port)
      {:EXIT, ^port, _} -> drop_messages(port)
    after
      0 -> :ok
    end
  end

  @doc "The meaning of an exit status, as a sentence."
  @spec exit_reason(non_neg_integer) :: String.t()
  def exit_reason(69),
    do: "a Python package is missing or cannot be imported: run `mix image.setup` and see the log"

  def exit_reason(64), do: "the Python process refused its command line"
  def exit_reason(65), do: "the Python process lost the framing"
  def exit_reason(66), do: "the Python process refused the handshake"
  def exit_reason(0), do: "the Python process ended by itself"

  def exit_reason(status) when status > 128,
    do: "the Python process was killed by signal #{status - 128}"

  def exit_reason(status),
    do: "the Python process ended with status #{status}; the log has its last words"
end
