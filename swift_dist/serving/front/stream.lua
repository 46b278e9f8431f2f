-- Three things that HAProxy's configuration cannot say. Loaded once for each thread.
--
-- complete_streams: a filter of the TCP listener that clients talk to. When the connection behind it ends within a
-- streamed answer (server-sent events in chunks), the client is sent an event that says so and the end of the body,
-- instead of a connection that is cut. It reads the head of each answer and the size of each chunk, nothing else.
--
-- read_model: an action that reads "model" (and "stream") from a request's JSON where the converter json_query cannot:
-- names with \u escapes, and keys that follow a value of more than 20 levels.
--
-- too_large: answers 413 with the text of txn.refusal once the body has come. A connection that is closed while the
-- client still sends is reset, and the client loses the answer.

local BROKEN = 'data: {"error": {"message": "The replica that generated this answer was lost. What was sent is '
    .. 'incomplete.", "type": "server_error", "param": null, "code": "stream_interrupted"}}\n\n'
local HEAD_BYTES = 16384 -- of an answer's head; the engines' have some hundred
local SIZE_BYTES = 18 -- of a chunk's size: 16 digits and the end of the line

local Streams = { id = "completes streams that broke" }
Streams.__index = Streams

function Streams:new()
    -- streaming: within the body of a streamed answer; left: bytes of its current chunk that are still to come;
    -- size: the beginning of a size whose end has not come
    return setmetatable({ streaming = false, left = 0, size = "" }, Streams)
end

function Streams:start_analyze(txn, channel)
    if channel:is_resp() then
        filter.register_data_filter(self, channel)
    end
end

-- Where in this text the body of a streamed answer begins (from 0); nil if it is the head of no such answer.
-- HAProxy writes the names of headers in lower case.
local function body_of_stream(text)
    local first = 1
    while true do
        local _, last = text:find("\r\n\r\n", first, true)
        if not last then
            return nil
        end
        if not text:find("^HTTP/1%.1 1%d%d ", first) then -- such as 100 Continue: another head follows
            local head = text:sub(first, last):lower()
            local streamed = head:find("^http/1%.1 200 ")
                and head:find("\r\ncontent-type: text/event-stream", 1, true)
                and head:find("\r\ntransfer-encoding: chunked", 1, true)
            return streamed and last or nil
        end
        first = last + 1
    end
end

-- Go through the chunks from `position` on, to the end of the answer or of what is there.
function Streams:skip_chunks(channel, position, length)
    while position < length do
        if self.left > 0 then
            local step = math.min(self.left, length - position)
            self.left, position = self.left - step, position + step
        else
            local known = #self.size
            self.size = self.size .. channel:data(position, math.min(SIZE_BYTES - known, length - position))
            local _, last, digits = self.size:find("^(%x+)\r\n")
            if not last then
                if #self.size >= SIZE_BYTES then
                    self.streaming = false -- not what HAProxy writes
                end
                return
            end
            position, self.size = position + last - known, ""
            self.left = tonumber(digits, 16) + 2
            if self.left == 2 then
                self.streaming = false
                return
            end
        end
    end
end

function Streams:tcp_payload(txn, channel)
    local length = channel:input()
    if length > 0 then
        local position = 0
        if not self.streaming then
            position = body_of_stream(channel:data(0, math.min(length, HEAD_BYTES)))
            if position then
                self.streaming, self.left, self.size = true, 0, ""
            end
        end
        if self.streaming then
            self:skip_chunks(channel, position, length)
        end
    end
    if self.streaming and not channel:may_recv() then
        if self.left > 0 or self.size ~= "" then
            self.streaming = false -- within a chunk: nothing can be said any more
        elseif channel:append(string.format("%x\r\n%s\r\n0\r\n\r\n", #BROKEN, BROKEN)) ~= -1 then
            self.streaming = false -- otherwise there is no room; tried again when the client has read on
        end
    end
end

core.register_filter("complete_streams", Streams, function(class, arguments)
    return class
end)

local ESCAPED = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

-- The text of a JSON string, given what is between its quotes.
local function unescaped(raw)
    local parts, position = {}, 1
    while true do
        local escape = raw:find("\\", position, true)
        parts[#parts + 1] = raw:sub(position, (escape or 0) - 1)
        if not escape then
            return table.concat(parts)
        end
        local letter = raw:sub(escape + 1, escape + 1)
        position = escape + 2
        if letter == "u" then
            local code = tonumber(raw:match("^%x%x%x%x", position) or "fffd", 16)
            local low = raw:match("^\\u([dD][c-fC-F]%x%x)", position + 4)
            if code >= 0xD800 and code < 0xDC00 and low then
                code = 0x10000 + (code - 0xD800) * 0x400 + tonumber(low, 16) - 0xDC00
                position = position + 6
            end
            position = position + 4
            parts[#parts + 1] = utf8.char(code)
        else
            parts[#parts + 1] = ESCAPED[letter] or letter
        end
    end
end

-- The string that begins at the quote `first`, and where it ends; nil where it does not end.
local function string_at(body, first)
    local position = first + 1
    while true do
        local found = body:find('["\\]', position)
        if not found then
            return nil
        end
        if body:byte(found) == 34 then
            return body:sub(first + 1, found - 1), found
        end
        position = found + 2
    end
end

core.register_action("read_model", { "http-req" }, function(txn)
    local body = txn.sf:req_body()
    local depth, position = 0, 1
    while true do
        local found = body:find('["{}%[%]]', position)
        if not found then
            return
        end
        local character = body:sub(found, found)
        position = found + 1
        if character == '"' then
            local key, last = string_at(body, found)
            if not key then
                return
            end
            position = last + 1
            local value = depth == 1 and body:match("^%s*:%s*()", position)
            if value then
                position = value
                key = unescaped(key)
                if key == "model" and body:sub(value, value) == '"' then
                    local name, name_last = string_at(body, value)
                    if not name then
                        return
                    end
                    txn:set_var("txn.model", unescaped(name))
                    position = name_last + 1
                elseif key == "stream" and body:find("^true", value) then
                    txn:set_var("txn.stream", true)
                end
            end
        elseif character == "{" or character == "[" then
            depth = depth + 1
        else
            depth = depth - 1
            if depth == 0 then
                return
            end
        end
    end
end, 0)

local DRAINED_BYTES = 1 << 28 -- of a body that is refused; whoever sends more may lose the answer
local PIECE_BYTES = 65536

core.register_service("too_large", "http", function(applet)
    local left = DRAINED_BYTES
    while left > 0 do
        local piece = applet:receive(PIECE_BYTES)
        if #piece == 0 then
            break
        end
        left = left - #piece
    end
    local text = applet:get_var("txn.refusal")
    applet:set_status(413)
    applet:add_header("content-type", "application/json")
    applet:add_header("content-length", #text)
    applet:start_response()
    applet:send(text)
end)
