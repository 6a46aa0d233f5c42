defmodule StarweaveImage.CrashLog do
  @moduledoc false
  # Keeps the state and messages of a process, which hold what users asked for, out of the log of a crash.

  @doc "Defines the callback `format_status/1`."
  defmacro __using__(_opts) do
    quote do
      # OTP has this callback since 25, Elixir knows it since 1.17.
      if Version.match?(System.version(), ">= 1.17.0"), do: @impl(true)
      @doc false
      def format_status(status), do: StarweaveImage.CrashLog.hidden(status)
    end
  end

  @doc "A status with sizes in place of contents."
  @spec hidden(map) :: map
  def hidden(status) do
    Map.new(status, fn {key, value} ->
      {key, if(key in [:state, :message, :log], do: size(value), else: value)}
    end)
  end

  defp size(value), do: "(not shown: #{:erlang.external_size(value)} bytes)"
end
